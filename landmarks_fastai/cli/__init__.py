"The command line of the three scripts."
