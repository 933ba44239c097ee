"""One module a measure; `measure` has the interface that all of them keep."""
