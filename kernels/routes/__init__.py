"""Index arithmetic and moves of rows for dispatch and combine, each in one kernel"""
