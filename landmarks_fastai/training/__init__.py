"The Learner, its callbacks and the stages."
