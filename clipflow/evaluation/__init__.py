"""Scores of a model, through the calls that anybody makes."""
