"""YAML recipes: what every section is made of, what is wrong with one, and those that ship."""
