"""Where captioned images come from: folders with metadata or texts, tables, saved data sets, the Hub."""
