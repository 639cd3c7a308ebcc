"""Heat and power: sensors, the budget, and the governor that keeps a node within it."""
