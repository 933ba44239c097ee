"""One command that tells somebody on their own machine whether low bits are for them."""
