"""Speed of the codecs on this machine's CPU or GPU."""
