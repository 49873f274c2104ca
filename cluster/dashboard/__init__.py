"""Pages over the Lance tables of a dataset: Streamlit, with DuckDB over what Lance scans."""
