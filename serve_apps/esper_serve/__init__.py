"""Tamiyo over HTTP: a Ray Serve application that decides on the reports which training sends.

Every decision is a pure function of the request and of the policy's version. What a policy
remembers of a run travels with the run's requests, so that any replica can answer any of them.
"""
