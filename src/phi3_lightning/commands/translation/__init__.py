"""From the dictionaries of a script to settings of this package."""
