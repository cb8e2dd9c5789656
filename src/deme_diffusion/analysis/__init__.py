"""What is learned about models beside their scores: their gradients. Arrays out; nothing is drawn."""
