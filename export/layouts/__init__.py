"""The layouts that a package can be written in; `table` has them by name."""
