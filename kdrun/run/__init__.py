"""One run: what is checked, prepared, built, trained and finished, and the folder it leaves."""
