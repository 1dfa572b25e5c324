"""Pages about runs, for people: the record of a run, charts, and the HTML file that shows them."""
