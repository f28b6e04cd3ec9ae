"""What runs a step: the plan of a parameter list, its tables and states, and the backends."""
