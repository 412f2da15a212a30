"""Demand of beverages by store, item and day: daily history in, the next days out."""
