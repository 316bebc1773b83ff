"""For people to look at: pictures, the report's page, comparisons of two variants."""
