"""Other families and transformers: conversion both ways."""
