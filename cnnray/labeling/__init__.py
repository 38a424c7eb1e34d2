"""Bulk labelling without Ray: the plan, the labeller, assembling rows into parts, publishing them."""
