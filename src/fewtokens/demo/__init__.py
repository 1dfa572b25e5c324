"""The demo in the browser: a picture, a method and a budget give predictions, token pictures, cost and time."""
