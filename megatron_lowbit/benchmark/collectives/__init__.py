"""Speed of the collectives: `sweep` over sizes, ranks and links, by a plan, with a report."""
