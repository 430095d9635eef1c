"The HTTP side of shopai: it loads the champion bundle from the model store and answers. NumPy and ONNX Runtime are all the science it needs."
