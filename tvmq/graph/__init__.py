"""Passes over canonical float Relax: layout, fusion chains."""
