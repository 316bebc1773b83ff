"""What people look at: pictures, the report's page, comparisons of two variants."""
