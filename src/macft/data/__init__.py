"""From files and hub ids to the rows of a step."""
