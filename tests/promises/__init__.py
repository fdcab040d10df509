"""What the project promises as a whole, one file per promise; tests of one module mirror it beside this."""
