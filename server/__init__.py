"""The HTTP server: FastAPI application, command line and load generator. Importing the package loads nothing heavy."""
