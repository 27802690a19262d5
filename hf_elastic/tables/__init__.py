"""Tables measured once, from which the cost or damage of any architecture is a sum: latency, quality."""
