Feature: Baskets

  Background:
    Given Ann has logged in

  Scenario: A basket belongs to a device
    Given a kettle
    And Ann has logged in on a second device
    When Ann puts 1 of the kettle into the basket
    Then the basket of Ann has the kettle
    And the basket of the second device has no kettle

  # Nobody orders: the basket references the session, and the session the user.
  Scenario: A full basket is left behind
    Given a kettle
    When Ann puts 1 of the kettle into the basket
    Then the answer is 303

  Scenario Outline: What cannot be put into a basket
    When Ann puts <quantity> of "<sku>" into the basket
    Then the answer is <status>

    Examples:
      | sku       | quantity | status |
      | none      | 1        | 404    |
      | gift-card | 0        | 400    |
