"""What each option of a recipe costs at each sync point: by gradients, or by running the model.

option_costs    both ways, and when which is taken
gradients       by a backward pass, in seconds or minutes
forward_only    by the divergence that each sync point's errors cause, where there is none
option_errors   the errors themselves, by really encoding and decoding
neighbours      which sync point takes whose errors
"""
