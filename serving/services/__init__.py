"One module a service: a thin router each, with no model logic."
