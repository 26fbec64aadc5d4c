"""The weights of the small cascade that ships with the package."""
