"The command line: one module a script, its flags, and the settings that they stand for."
