"""Tests of the data room.

Two kinds of fault cannot happen here: no token is ever added to a tokenizer, so none can be lost, and no row is ever
decoded and encoded again, so no white space can be lost on the way.
"""
