"""The ResNet in front of a hybrid."""
