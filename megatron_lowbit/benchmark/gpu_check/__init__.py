"""What a GPU says of the kernels, in one command: stages that check and time them."""
