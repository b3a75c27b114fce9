"""Asks whether flooding beats what people would use instead."""
