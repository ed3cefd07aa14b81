"""Run folders, and one HTML page that compares the runs in them."""
