"""The methods side by side on one trained model: the runs, the command, and the page."""
