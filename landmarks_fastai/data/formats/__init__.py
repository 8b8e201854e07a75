"Readers of label files as other tools write them: each returns a `LabelTable`."
