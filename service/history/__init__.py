"""History: what the nights of one suite say together, and which of them began something."""
