"""Folders of models, whatever the family: files, published fields, loading, conversion."""
