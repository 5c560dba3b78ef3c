"""Losses on the command line: built, listed, described, plotted, checked and begun anew."""
