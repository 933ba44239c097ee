"""What the cost model says of hardware that is not here, and how well it does here."""
