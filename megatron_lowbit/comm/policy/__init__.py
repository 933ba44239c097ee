"""The policy: by which collective a message goes, the same on every rank."""
