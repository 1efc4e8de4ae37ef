"""The papers' tables: each number a cell that is measured once, stored, and set beside the published one."""
