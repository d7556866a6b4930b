"""Other people's tools, given a posterior: each module needs its tool, and nothing else here needs the module."""
