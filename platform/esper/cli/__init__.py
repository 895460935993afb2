"""The command line: `esper run | ab | ui | doctor`."""
