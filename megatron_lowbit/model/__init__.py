"""What calibration and evaluation see of a model: its logits, and how it sums partials.

language_model   tokens to logits, and the tokenizer
logits           log-probabilities, KL and gradients of logits that are split over ranks
summing          sync points, reducers and the two ways to sum, as protocols
stages           what pipeline stages tell each other
forward          tokens through a module, as Megatron's models take them
"""
