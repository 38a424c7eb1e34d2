"""Bulk labelling without Ray: the plan, the labeller, rows assembled into parts, publishing."""
