"""From what people have (prefixes, specs, locks) to the trees that are pushed."""
