"""Steps of any rank on shapes alone"""
