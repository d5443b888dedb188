"""Comparing settings over several seeds: a plan of runs, running them, reporting what came out."""
